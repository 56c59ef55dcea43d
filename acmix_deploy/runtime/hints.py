"""What to do about a failure, where several places say it: the stage that fails, and ``doctor`` of a pasted message."""

# Engines
UNKNOWN_OPERATORS = (
    "Operators of acmix need --plugin or a file with their definitions; others have to be exported otherwise."
)
TOO_LITTLE_MEMORY = "End other programs on the device, or build for a smaller --max."
FREE_AXES = "Give the shapes to build for: --min, --opt and --max, each B,C,H,W."
OTHER_SHAPE = "Give images of such a size, or build the engine for more: --min, --opt and --max."

# ONNX Runtime
NO_PROVIDER = (
    "Run: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu. Both fill the same folder, "
    "so one has to go before the other comes."
)
PROVIDER_NEEDS = (
    "It needs a GPU and the CUDA, cuDNN and, for tensorrt, TensorRT that this release of ONNX Runtime names: "
    "https://onnxruntime.ai/docs/execution-providers"
)

# Checkpoints
INCOMPLETE = "Is it complete, and was it written by torch.save? Copy or download it again."
UNTRUSTED = (
    "If these classes can be imported here, --trust loads it; with --code DIR, from the folder of their code. That "
    "runs code from the file: use it only if you know where the file comes from."
)
OTHER_RELEASE = "The class is older or newer than the checkpoint: install the release that saved it"

# Packages
NO_TORCH = (
    "Run: pip install 'acmix-deploy[export]', or for checkpoints of Ultralytics: "
    "pip install 'acmix-deploy[ultralytics]'"
)
NO_ULTRALYTICS = "Run: pip install 'acmix-deploy[ultralytics]' (the licence of Ultralytics is AGPL-3.0)"
OTHER_ULTRALYTICS = "docs/checkpoints.md#ultralytics names releases that were tried."
NO_TENSORRT = "On a Jetson make the environment with --system-site-packages; elsewhere: pip install tensorrt"
