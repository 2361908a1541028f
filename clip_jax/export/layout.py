"""Names of the files of an export."""

PREPROCESS = "preprocess.json"
CARD = "README.md"
TENSORS = "model.safetensors"
TOWERS = ("encode_image", "encode_text")  # methods of the model, and the stems of their files
STABLEHLO, ONNX = ".stablehlo", ".onnx"
