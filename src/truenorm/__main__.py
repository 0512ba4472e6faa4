"""python -m truenorm."""

from truenorm.cli import main

if __name__ == "__main__":
    main()
