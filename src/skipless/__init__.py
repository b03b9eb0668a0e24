"""skipless: self-supervised Vision Transformers without skip connections."""

__version__ = "0.1.0"
