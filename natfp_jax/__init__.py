"""What makes a language model recognisable by its text when nothing but X changed?"""

__version__ = "0.1.0"
