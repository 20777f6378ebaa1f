from miniature.build import main

main()
