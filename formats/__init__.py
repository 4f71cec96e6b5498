"""Weights as other programs need them: transformers' folders, llama.cpp's GGUF files, and our own files in int8."""
