"""Images and labels in, batches out; knows nothing of distillation."""
