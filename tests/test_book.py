"""docs/book.md: its commands run, its functions and tests exist, its answers apply and run."""

import ast
import re
import runpy
import shlex
import sys

import pytest
from test_family import ROOT, SCRIPTS, definitions
from test_metrics import NAME  # noqa: F401
from test_recipes import block
from test_scripts import chain  # noqa: F401 (a fixture)

import common
