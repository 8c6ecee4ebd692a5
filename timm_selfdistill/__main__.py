"""python -m timm_selfdistill: the command timm-selfdistill."""

from timm_selfdistill.cli.main import main

if __name__ == "__main__":
    main()
