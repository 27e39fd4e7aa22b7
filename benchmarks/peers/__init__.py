"""One distillation job in this project's trainer, and in those of other projects."""
