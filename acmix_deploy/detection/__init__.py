"""What calibration, verification and serving of detectors share: images as the model was trained to see them."""
