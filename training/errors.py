"""What a user can mend: shown as a message, without a traceback."""


class TrainingError(ValueError):
    """Says what was found, what was expected and what to do."""
