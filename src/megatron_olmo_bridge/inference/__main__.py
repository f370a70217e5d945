"""Start the worker.

megatron-core's checkpoint writer starts a process that imports this module again, so there is no
heavy import at the top."""

if __name__ == "__main__":
    from .worker import main

    main()
