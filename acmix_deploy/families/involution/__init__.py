"""Outlook attention: VOLO's block, whose every pixel weighs the window around it."""
