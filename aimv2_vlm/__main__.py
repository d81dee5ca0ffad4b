from aimv2_vlm.cli import command

command()
