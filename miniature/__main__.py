from miniature.command import main

main()
