"""Where bytes live and how they move: copy plans, kernel copies, folders that appear whole."""
