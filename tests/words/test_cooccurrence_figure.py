import numpy as np
import PIL.Image

from experiments.figures import cooccurrence


def test_the_picture_and_the_numbers_behind_it(tmp_path, capsys):
    assert cooccurrence.main([f"--out={tmp_path / 'new'}"]) == 0
    with PIL.Image.open(tmp_path / "new" / "cooccurrence.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 500
    assert pixels.std() > 10
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split() == ["like", "2", "0", "0", "1", "0", "1", "0", "0"]
    table = cooccurrence.lecture_table()
    u, s, _ = np.linalg.svd(table)
    np.testing.assert_allclose([float(x) for x in printed[9].split()[2:]], s, atol=1e-4)
    plane = np.asarray([line.split()[1:] for line in printed[11:19]], np.float64)
    # The plane up to the sign of each axis.
    np.testing.assert_allclose(np.abs(plane), np.abs(u[:, :2] * s[:2]), atol=2e-4)


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cooccurrence.main([f"--out={tmp_path / 'file' / 'folder'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err
