"""Shared directions of several models: model_m ≈ hyper-model + Σ_i λ_mi · LoRA_i, solved on small cores."""
