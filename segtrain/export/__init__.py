"""Export a checkpoint for other programs: ONNX, torch.export, safetensors."""
