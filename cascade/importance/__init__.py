"""What to keep: one streamed calibration pass turns activations into one score vector per axis."""
