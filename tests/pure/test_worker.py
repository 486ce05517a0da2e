"""What a rank prepares before it imports torch."""

from pathlib import Path

from jepa_cluster.launch.worker.main import set_torch_variables
from jepa_cluster.trial.directory import Root


def test_the_cache_of_the_compiler_is_private_to_the_code_snapshot(tmp_path: Path) -> None:
    """It lies beside the snapshots, which stay as they are. A clone keeps torch's default."""
    env: dict[str, str] = {}
    set_torch_variables(env, tmp_path / "code" / "0123")
    assert env.pop("TORCHINDUCTOR_CACHE_DIR") == str(Root(tmp_path).compiled("0123"))
    assert env == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    own = {"TORCHINDUCTOR_CACHE_DIR": "mine", "PYTORCH_ALLOC_CONF": "mine"}
    set_torch_variables(own, tmp_path / "code" / "0123")
    assert set(own.values()) == {"mine"}
    clone = dict(env)
    set_torch_variables(clone, tmp_path / "clone")
    assert "TORCHINDUCTOR_CACHE_DIR" not in clone
