from fnrecipe.cli.main import main

main()
