"""Accelerated operations. Each module holds the formula, a plain PyTorch reference and the function that chooses.

Nothing here imports the rest of the project. (`kernels` is also the name of a Hugging Face package that
transformers and diffusers look for; see tests/test_layout.py for the proof that both live side by side.)
"""
