"""A directory that configures mirrors, as `boot.py --hosts-dir` takes it."""

from pathlib import Path


def mirrored(directory: Path, address: str) -> None:
    """Have `mirrored.invalid` mirrored by the registry at `address`, by way of a link."""
    hosts = directory / "mirrored.invalid"
    hosts.mkdir(parents=True)
    elsewhere = directory.with_name(f"{directory.name}.toml")
    elsewhere.write_text(f'[host."http://{address}"]\n')
    (hosts / "hosts.toml").symlink_to(elsewhere)
