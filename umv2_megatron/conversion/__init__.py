"""Checkpoints to Hugging Face exports and back, tensor by tensor; nothing is ever held whole (docs/hugging-face.md)."""
