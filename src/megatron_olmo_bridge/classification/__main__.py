"""``python -m megatron_olmo_bridge.classification``: see :mod:`.compare`."""

if __name__ == "__main__":
    from .compare import main

    main()
