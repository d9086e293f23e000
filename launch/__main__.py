"""`python -m launch`."""

from launch.cli import run

if __name__ == "__main__":
    run()
