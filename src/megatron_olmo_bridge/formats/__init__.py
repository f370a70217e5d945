"""Files: which bytes of which file hold which tensor. Headers are checked, never guessed."""
