"""Live models at work, in processes of their own: compared with transformers, and generating."""
