"""Runs nocloud.py from its kept bytecode: as a script it is compiled at each call, longer than most commands take."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import nocloud

sys.exit(nocloud.main(["nocloud", *sys.argv[1:]]))
