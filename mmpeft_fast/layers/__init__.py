"""Drop-in modules: eager layers that carry PEFT parameters, and the classes that fused modules take on."""
