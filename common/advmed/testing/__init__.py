"""What others can test their own hosts with; needs pytest, which nothing else of advmed imports."""

import pytest

pytest.register_assert_rewrite(__name__)  # so that a failed comparison shows its values
