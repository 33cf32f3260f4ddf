"""The small study: every method on every model, by HF PEFT and fused, beside the frozen model's forward + dX."""
