"""Accelerated operations. Each module holds the formula, a plain PyTorch reference and the function that chooses.

Nothing here imports the rest of the project. A Hugging Face package that transformers and diffusers look for has the
same name; tests/test_layout.py holds that importing either beside this one works.
"""
