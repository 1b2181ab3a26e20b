"""Widgets that draw lines themselves: what is not seen is neither made nor kept."""
