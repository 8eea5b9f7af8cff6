"""Off-policy reinforcement learning for pretrained flow-matching robot policies."""
