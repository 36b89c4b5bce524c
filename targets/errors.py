"""Everything that edgestill refuses, and the exit code each refusal ends with.

A message has three parts: what was given, why it cannot be, what to do. Stdlib only: the device side raises these too.
"""


class EdgestillError(Exception):
    """Base of all errors that a person can mend; `exit_code` is what the command ends with."""

    exit_code = 1


class RecipeError(EdgestillError):
    """The command line or the recipe asks for something that does not exist."""

    exit_code = 2


class DataError(EdgestillError):
    """The data are absent, unreadable, or not what the recipe says they are."""

    exit_code = 2


class ModelError(EdgestillError):
    """The model, its weights or its shapes do not fit."""

    exit_code = 2


class TrainingError(EdgestillError):
    """Training cannot go on: a loss that is not a number, a teacher at chance level."""

    exit_code = 3


class GateError(EdgestillError):
    """The artifact misses the accuracy gate."""

    exit_code = 3


class BudgetError(EdgestillError):
    """A latency, memory, size, load or accuracy budget is exceeded."""

    exit_code = 4


class TargetError(EdgestillError):
    """The target cannot run the model: lint, placement, version, unsupported operator."""

    exit_code = 5


class DeviceError(EdgestillError):
    """The device cannot be reached, or its side of the work failed."""

    exit_code = 6


class MeasurementError(EdgestillError):
    """A measurement is not trustworthy, or a value that a budget needs could not be read."""

    exit_code = 7


class IntegrityError(EdgestillError):
    """A file is not the one that was written: a flipped byte, a truncated or a foreign file."""

    exit_code = 5


def first_line(error: BaseException) -> str:
    """What a foreign error says, on one line of 200 characters at most, or its class: for the middle of a message of ours."""
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")
