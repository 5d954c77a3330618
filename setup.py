"""The package, described by settings.ini."""
from configparser import ConfigParser
from pathlib import Path
from re import sub

from setuptools import setup

settings = ConfigParser()
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = settings["DEFAULT"]

# On PyPI, links and pictures of README.md that stay within the repository would lead nowhere
readme = Path(__file__).with_name("README.md").read_text("utf-8")
readme = sub(r"(!\[[^]]*\]\()(?!http)", rf"\1{cfg['git_url']}/raw/{cfg['branch']}/", readme)
readme = sub(r"((?<!!)\[[^]!]*\]\()(?!http|#)", rf"\1{cfg['git_url']}/blob/{cfg['branch']}/", readme)

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
                  "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: {version}" for version in ("3.10", "3.11", "3.12", "3.13")),
    ],
    packages=[cfg["lib_path"]],
    package_data={cfg["lib_path"]: ["*.safetensors"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"scans": cfg["scans_requirements"].split(), "volumes": cfg["volumes_requirements"].split(),
                    "dev": f"{cfg['dev_requirements']} {cfg['scans_requirements']} {cfg['volumes_requirements']}".split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
