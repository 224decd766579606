"""The command ``zsu-fast``: what a person types becomes calls of the package.

In: names of models, files and numbers as text. Out: tables or JSON on stdout, warnings and errors
on stderr, files. Exit code 2 stands for an error of the package, 130 for Ctrl-C.
Read `app` first: it lists the commands. `options` declares what they share, `inputs` reads it,
`output` prints.
"""
