"""A checkpoint written for other programs: ONNX, torch.export, safetensors."""
