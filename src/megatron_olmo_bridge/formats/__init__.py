"""File formats: which bytes of which file hold which tensor, as their headers say."""
