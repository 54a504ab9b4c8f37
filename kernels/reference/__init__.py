"""The specification of every op in plain PyTorch: any device, any float type, differentiated by PyTorch itself."""
