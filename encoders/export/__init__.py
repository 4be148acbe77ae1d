"""Folders that other libraries open: open_clip, timm, transformers, sentence-transformers, ONNX.

Every writer takes a model and an empty folder, and leaves weights as safetensors (or ONNX), JSON
and a model card. `python -m scripts.export` calls them.
"""
