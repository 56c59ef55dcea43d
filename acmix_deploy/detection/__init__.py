"""What calibration, verification and serving of detectors share: images as the model saw them, and detections."""
