"""Ray Train around the loop: the trainer, what feeds its workers, when it starts them again."""
