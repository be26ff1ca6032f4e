"""Speed of a training step: dlx, plain flax.linen and PyTorch side by side."""
