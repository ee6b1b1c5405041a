{
  const news = document.getElementById("news"), silence = document.getElementById("silence");
  news.hidden = Date.now() / 1000 > Number(silence.dataset.from);
  silence.hidden = !news.hidden;
}
