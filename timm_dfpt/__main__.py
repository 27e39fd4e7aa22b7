"""`python -m timm_dfpt COMMAND`, and in several processes `accelerate launch -m timm_dfpt COMMAND`."""
from timm_dfpt_cli import main

if __name__ == '__main__':
    main()
