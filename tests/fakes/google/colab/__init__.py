"A stand-in for the package that Colab's machines have: the part of it that the notebooks use."
