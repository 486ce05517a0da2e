"""tests/ is on the path, so that `fabricate` and its like can be imported from every folder below."""
