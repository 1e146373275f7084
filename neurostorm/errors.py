"""What a job answers with one sentence instead of a traceback."""


class UserError(Exception):
    """Input, a setting or the machine cannot be used; the message says what is wrong, where, and what to do."""
