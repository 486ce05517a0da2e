"""The model and its objective: masks, encoder, predictor, loss, schedules, weights, FLOPs."""
