"""Errors that several rooms raise."""

from hub_cards.user_error import UserError


class SettingsError(UserError):
    """A setting is unknown or impossible. The message names it."""


class MissingWeights(UserError):
    """The weights of a metric or a loss can neither be found nor downloaded. The message names the remedies."""
