"""`python -m vitrim`: the command, also as `torchrun -m vitrim` starts it."""

from vitrim.cli import main

if __name__ == "__main__":
    main(prog_name="vitrim")
